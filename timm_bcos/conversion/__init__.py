"""Conversion of any model to its B-cos equivalent: inspect the model, plan the conversion, apply the plan."""
