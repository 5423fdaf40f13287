"""Who speaks and judges: engines, attacker, learner rollouts, critic, experts, and their plug-ins."""
