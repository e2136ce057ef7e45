"""Devices, processes and their memory, for the other folders of `train`."""
