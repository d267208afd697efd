"""From a program to a module that runs: the packed operator, its paths on each device, the swap into the model."""
