"""Interoperation with other implementations' files."""
