"""What `make bench` and developers measure beyond `python -m dlkernels bench`, whose code this builds on."""
