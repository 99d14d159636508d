"""Linear layers found in the trace of an objective, and what a batch says about them.

* `views`: invertible rearrangements of parameters.
* `provenance`, `matching`, `discovery`: where values come from, which equations are layers.
* `uses`: one use of a weight in matrix form; `layer`: layers and `find_layers`; `report`.
* `probes`: the inputs and output cotangents of all layers in one pass.
* `statistics`: means and second moments of these; `groups`: layers of equal shape side by side.
* `blocks`: partitions of the parameters by layers or by labels.
"""

from secondorder.layers.layer import Layer, Layers, find_layers

__all__ = ["Layer", "Layers", "find_layers"]
