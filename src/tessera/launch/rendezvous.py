"""The rendezvous that torch's agent asks for: the launchers have met already, so it only hands over where."""

import uuid

from torch.distributed import PrefixStore
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from tessera.launch.machines import Meeting, Place


class Rendezvous(RendezvousHandler):
    """One attempt's rendezvous. The ranks use the attempt's store too, which outlives each of them."""

    def __init__(self, place: Place, meeting: Meeting) -> None:
        self.place, self.meeting = place, meeting
        self.run_id = uuid.uuid4().hex

    def get_backend(self) -> str:
        """Any name will do."""
        return "tessera"

    @property
    def use_agent_store(self) -> bool:
        """Yes: it listens already, so that no port must be guessed free, and it is new in every attempt."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Where the ranks find one another."""
        bootstrap = RendezvousStoreInfo(self.meeting.address, self.meeting.port)
        store = PrefixStore("agents", self.meeting.store)
        return RendezvousInfo(store, self.place.rank, self.place.machines, bootstrap)

    def is_closed(self) -> bool:
        """No: who ends the run ends the agent."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def num_nodes_waiting(self) -> int:
        """None: the machines are counted beforehand, and who fails ends the attempt for all (`Watch`)."""
        return 0

    def get_run_id(self) -> str:
        """A name that is used once."""
        return self.run_id

    def shutdown(self) -> bool:
        """Nothing to shut down: the store goes with the meeting."""
        return True
