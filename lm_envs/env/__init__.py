"""The environments: the MDP, its vector and single-row forms, KL reporting, rollouts, and the Cat gridworld."""
