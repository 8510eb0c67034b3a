"""The recurrent family: layers and cells, from the modules down to the operators."""
