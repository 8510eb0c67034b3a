"""Code that the recurrent layers and attention share. Nothing here imports dlkernels.rnn or dlkernels.attention."""
