"""The methods that the training loop knows, each by what tells it from the others."""

from dataclasses import dataclass

from adversarial_objective import AdversarialObjective
from image_rows import GridRows, LogitNormalRows
from objectives import ConsistencyObjective, DiscreteObjective, TBCMObjective
from teacher_rows import TeacherRows


@dataclass(frozen=True)
class Method:
    """Where a method's rows come from, and what it minimises on them; both add flags and lines of the model card.

    Args:
        name: what the model card calls it.
        rows: of `teacher_rows` or `image_rows`.
        objective: of `objectives`.
        image_free: whether it trains on prompts alone.
    """

    name: str
    rows: type[TeacherRows] | type[LogitNormalRows] | type[GridRows]
    objective: type[TBCMObjective] | type[ConsistencyObjective] | type[DiscreteObjective]
    image_free: bool = False


TBCM = Method("TBCM, image-free", TeacherRows, TBCMObjective, image_free=True)
SCM = Method("sCM (arXiv 2410.11081)", LogitNormalRows, ConsistencyObjective)
SANA_SPRINT = Method("Sana-Sprint (arXiv 2503.09641)", LogitNormalRows, AdversarialObjective)
LCM = Method("LCM (arXiv 2310.04378)", GridRows, DiscreteObjective)
