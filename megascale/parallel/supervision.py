"""The words between a rank and the agent that supervises it: variables of its environment, and the call for a dump.

None of the variables is set where nobody supervises.
"""

import signal

HEARTBEAT_VARIABLE = "MEGASCALE_HEARTBEAT"
"""Path of the rank's heartbeat file."""
WATCH_VARIABLE = "MEGASCALE_WATCH_FD"
"""The rank's end of a pipe: a byte asks for a dump, its end says that the agent is gone."""
DUMP_VARIABLE = "MEGASCALE_DUMP_FOLDER"
"""Where dumps go."""
STORE_FD_VARIABLE = "MEGASCALE_STORE_FD"
"""Rank 0's listening socket of the rendezvous store, which who started it has opened and bound to one interface."""
INCARNATION_VARIABLE = "MEGASCALE_INCARNATION"
"""Names the attempt of the run that a rank belongs to; all ranks of one attempt have the same."""
LIFE_VARIABLE = "MEGASCALE_LIFE"
"""Names the launcher's life, in which one attempt begins only when the one before it is gone."""

DUMP_BYTE = b"d"
DUMP_SIGNAL = signal.SIGUSR2
"""Writes the stacks of all threads even while a library holds the interpreter's lock."""
