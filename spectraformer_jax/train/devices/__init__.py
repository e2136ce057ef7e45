"""Devices, processes and their memory: no other room of `train` names them."""
