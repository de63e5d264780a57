"""From any network to its B-cos equivalent: the config, the rules, the plan, and the converted network."""
