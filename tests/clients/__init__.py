"""Exports in the programs that they are for, where these are on the machine; see `test_comfyui.py`."""
