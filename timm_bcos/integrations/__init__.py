"""Support of B-cos layers in other libraries, which would treat them as linear layers; see `registration`."""
