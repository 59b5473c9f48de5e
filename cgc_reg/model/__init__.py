"""Everything that touches a user's model, one idea a file.

A pass of an explainer calls these in this order:

1. ``turns``: one pass of ours at a time on a model. ``reuse``: is there a pass of the loop's own that shows the layer?
   Then it is taken, and steps 2 to 4 fall away.
2. ``processes``: does the pass go around a DistributedDataParallel that holds the model?
3. ``passes`` runs the model as it was written (``compilation``), through DistributedDataParallel (``wrappers``), marked
   as a pass of ours (``own``), and keeps what the layer (``layers``) puts out (``capture``, with ``attention`` in the
   form that can be differentiated twice from there on); ``outputs`` finds the class scores in what it returns.
4. ``frozen``: has it put gradients on where the model freezes weights?
5. ``maps``: the layer's output as maps; ``gradient``: the score's gradient by it, or ``head``: the head's weight.
6. ``path``: what lies between the layer and the logits, and around the layer?
7. ``trainability``: does the heatmap reach something that can be trained? In several processes ``processes`` then lets
   its backward reach all parameters.

An extra pass (``extra``) wraps all of this: ``state`` lends copies of what it writes, ``checkpoints`` notes which
modules the backward will run again, and if it will, ``replica`` gives it modules that keep the settings of the pass.
``settings``, ``given`` and ``measure`` set something and set it back, ``hooks`` are hooks that copies of a module do
without, ``graph`` walks through autograd's graph, and ``suggest`` makes a pass of its own to find a layer.

Nothing here imports from outside of this folder but the helpers whose names begin with an underscore.
"""
