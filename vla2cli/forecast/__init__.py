"""What a run would find, take and cost, before it is begun: `vla2 plan`."""
