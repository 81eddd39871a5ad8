"""What an expert computes: the bank of experts resident on a rank, the service that answers, the client that asks."""

from experts.bank import ExpertBank
from experts.client import ExpertClient, WorkId
from experts.hold import HoldRule
from experts.service import ExpertService, LocalCall, answer_frame

__all__ = ["ExpertBank", "ExpertClient", "ExpertService", "HoldRule", "LocalCall", "WorkId", "answer_frame"]
