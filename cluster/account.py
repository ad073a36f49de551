"""The account of prompts: each that is handed out is trained on, dropped for a reason, rewound, or still in flight."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from cluster.checkpoints import LoopState
from configs.errors import RunError


@dataclass
class Account:
    """What became of the groups so far.

    stale: too old to be trained on; flat: without spread, and others were sampled for them; rewound: handed out after
    the checkpoint that the run went back to, and so handed out again.
    """

    trained: int = 0
    stale: int = 0
    flat: int = 0
    rewound: int = 0
    handed_out: int = 0  # when it was last looked at

    def note(self, trained: int = 0, stale: int = 0, flat: int = 0) -> None:
        """What became of the groups of one step."""
        self.trained += trained
        self.stale += stale
        self.flat += flat

    def rewind(self, state: LoopState) -> None:
        """Back to where a checkpoint's state was taken."""
        self.rewound += self.handed_out - state.cursor
        self.trained, self.stale, self.flat, self.handed_out = state.trained, state.stale, state.flat, state.cursor

    def check(self, handed_out: int, in_flight: int) -> None:
        """RunError unless every prompt is accounted for, once. handed_out: since the run began, those that were
        rewound not counted; in_flight: being sampled or judged, or waiting to be trained on."""
        self.handed_out = handed_out
        known = self.trained + self.stale + self.flat + in_flight
        if known != handed_out:
            raise RunError(
                f"The account of prompts does not balance: {handed_out} were handed out, and {self.trained} trained on "
                f"+ {self.stale} too old + {self.flat} without spread + {in_flight} in flight are {known}. A group was "
                "lost or taken twice; that is a fault of this program, please report it with the run's log."
            )

    def facts(self) -> dict[str, int]:
        """What status.json says of it."""
        return asdict(self)
