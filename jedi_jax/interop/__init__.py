"""Reading and writing files of other implementations."""
