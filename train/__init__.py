"""How parameters are found: the loop, the tasks, the data, the devices."""
