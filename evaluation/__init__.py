"""How good a policy is: closed-loop rollouts on unseen seeds, errors on held-out rows, and a report of both."""
