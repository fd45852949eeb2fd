"""Devices and processes: meshes, layouts, start-up and exchange."""
