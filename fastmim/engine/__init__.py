"""Engines: how processes share a step. `choose` picks one and says why; deepspeed is imported in zero.py alone."""
