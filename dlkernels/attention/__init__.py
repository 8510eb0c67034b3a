"""The attention family: functions and layers, from the modules down to the operators."""
