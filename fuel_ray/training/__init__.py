"""Everything that knows RLlib or a learner."""
