"""A profile of this machine for the planner: rates of its devices, times of collectives, measured by every rank."""
