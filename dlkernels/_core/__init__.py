"""What both families stand on. Nothing here imports dlkernels.rnn or dlkernels.attention."""
