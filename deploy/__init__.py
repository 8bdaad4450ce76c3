"""Ways to run the application: in one process, in Flower's simulation, on real machines."""
