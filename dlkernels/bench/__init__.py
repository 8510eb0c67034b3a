"""`python -m dlkernels bench` checks our layers against torch.nn and times both on this machine."""
