"""How bytes move: links, frames, dispatch and combine, tensor-parallel collectives, control sockets. Knows no model.

Names are imported from the modules that have them: the frontend needs the control sockets, and no torch.
"""
