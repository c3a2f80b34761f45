"""Resources, placement groups, actor health, faults, claims and the Ray runtime's end."""
