"""Numbers in fewer bits: schemes, calibration, and programs that compute with integers."""
