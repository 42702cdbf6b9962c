"""`graftax plan`: memory, FLOPs, traffic and time of a run before it runs, from the compiled program or from a model.

trace and jaxpr_memory model the step on one device; estimate adds the mesh and the collectives; hlo reads the
collectives of a compiled program; planner combines them; search tries meshes and batches; command and report are the
interface.
"""
