"""Hardware calibration: what single parts of a step, of memory and of its links cost, cell by cell."""
