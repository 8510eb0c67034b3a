"""`python -m dlkernels bench`: our layers against torch.nn on this machine, checked before they are timed."""
