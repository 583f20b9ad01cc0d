"""Files of a run, and the parts of its programs: console, signals, exit statuses, sweeps."""
