"""A registration as a picture and as a page."""
