"""Play in the dream of a trained model: a page in the browser, served to this machine alone."""
