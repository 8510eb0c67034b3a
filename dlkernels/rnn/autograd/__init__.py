"""The recurrent operators as autograd Functions, with vmap and double backward."""
