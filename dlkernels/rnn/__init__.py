"""The recurrent layers and cells, from the modules down to the operators."""
