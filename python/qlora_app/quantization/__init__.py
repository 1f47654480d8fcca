"""The options of the commands that quantize: calibration, the initial adapter, and layers that stay in 16 bits."""
