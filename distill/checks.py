"""Settings of a run that do not go together, said before it starts."""

from __future__ import annotations

from typing import TypeGuard

from distill.ensembles import Nobody
from distill.losses.base import FaceLoss
from distill.losses.cross_architecture import URFM, PromptGuard
from distill.losses.features import FeatureLoss
from distill.losses.logits import CrossEntropy
from distill.losses.mutual import EachPeer
from distill.mixtures import recurring
from distill.objective import Objective
from distill.settings import Run
from distill.sources import CorpusSource, OnlineSource, Place, Rows, Source
from distill.teachers import check_views
from faceless.errors import InputError
from faceless.recognizer import Recognizer


def check_run(run: Run, objective: Objective, teacher: Recognizer, place: Place) -> None:
    """All that can be known to be wrong before the source writes a face.

    Raises:
        InputError: naming the setting.
    """
    run.source.check(place)
    check_weights(run, objective)
    check_teacher(run, objective, teacher)
    wanted = grouped(run.source) or bool(objective.needs_labels)
    check_labelled(run, objective, wanted and run.source.may_be_labelled())
    check_cache(run)
    check_used(run, objective)


def grouped(source: Source) -> TypeGuard[Rows]:
    """Whether faces of one identity come together."""
    return isinstance(source, Rows) and source.together > 1


def check_cache(run: Run) -> None:
    """Compare the teacher's cache with the faces.

    Raises:
        InputError: they do not recur, or not in a known number of views.
    """
    if run.teacher_cache is None:
        return
    if not (found := recurring(run.source)):
        raise InputError(f"teacher_cache: {type(run.source).__name__} never shows a face twice; remove teacher_cache")
    for source in found.values():
        check_views(source, augmented=run.teacher_sees == "view")


def check_labelled(run: Run, objective: Objective, labelled: bool) -> None:
    """Compare whether the faces have identities with what the losses need.

    Raises:
        InputError: naming the loss, or the setting, that does not fit.
    """
    name, source = type(run.source).__name__, run.source
    if objective.needs_labels and not labelled and run.pseudo_identities is None:
        raise InputError(
            f"losses.{objective.needs_labels[0]} needs labels, and {name} has none; "
            "for a corpus, pseudo_identities makes some"
        )
    for term in objective.scattered:
        if term not in objective.needs_labels or not source.scatters:
            raise InputError(
                f"losses.{term}.scattered: it is for a loss of labels, and for faces of which some come together and "
                "some do not: set together and scattered of the source"
            )
    if grouped(source) and not labelled and run.pseudo_identities is None:
        raise InputError(
            f"source.init_args.together is {source.together}, and {name} has no labels to go by; for a corpus, "
            "pseudo_identities makes some"
        )
    if run.pseudo_identities is not None and not isinstance(source, Rows):
        raise InputError(f"pseudo_identities are clusters of the faces of one corpus, and {name} is none")


def check_classes(run: Run, objective: Objective) -> None:
    """Compare how many identities the faces have with what the losses need.

    Raises:
        InputError: naming the loss, or the setting, that does not fit.
    """
    source = run.source
    classes = run.pseudo_identities or source.classes
    if objective.needs_labels and not classes:
        raise InputError(f"losses.{objective.needs_labels[0]} needs labels, and no face of {source.name()} has one")
    for term, loss in objective.terms():
        if loss.classes is not None and classes > loss.classes:
            raise InputError(f"losses.{term} is for {loss.classes} classes, and the faces have {classes} identities")
    if objective.needs_centers and not (isinstance(source, Rows) and run.teacher_cache is not None and classes > 1):
        wants = "classifier" if run.classifier is not None else "a loss of the teacher's class centers"
        raise InputError(
            f"{wants} needs the mean teacher embedding of each identity: set teacher_cache, and a labelled source "
            "or pseudo_identities"
        )


def check_weights(run: Run, objective: Objective) -> None:
    """Compare the weights of the faces with what the losses can do.

    Raises:
        InputError: the source gives its faces weights, and a loss cannot take them.
    """
    for term, loss in objective.terms():
        if run.source.weighs and not isinstance(loss, FaceLoss):
            raise InputError(
                f"losses.{term}: {type(loss).__name__} is no mean over single faces, and cannot weight them as this "
                "source asks; use another loss, or set the source's correction to [0, 0]"
            )


def check_used(run: Run, objective: Objective) -> None:
    """Refuse what would be read, or made, and then looked at by nothing.

    Raises:
        InputError: naming the setting.
    """
    losses = [loss for _, loss in objective.terms()]
    source = run.source
    if run.classifier is not None and not any(loss.needs_logits or isinstance(loss, CrossEntropy) for loss in losses):
        raise InputError("classifier: no loss compares scores over identities; add one, or leave it out")
    if run.degrade is not None and not (run.degrade.resolutions or run.degrade.mask or run.degrade.occlude):
        raise InputError("degrade changes no face: set resolutions, mask or occlude, or leave it out")
    if run.pseudo_identities is not None:
        if isinstance(source, CorpusSource) and source.label_file is not None:
            raise InputError("pseudo_identities would take the place of source.init_args.labels; leave one of them out")
        if not (grouped(source) or objective.needs_labels or objective.needs_centers):
            raise InputError("pseudo_identities: no loss looks at labels; add one, or leave them out")
    if isinstance(source, CorpusSource) and source.landmark_file and not any(isinstance(one, URFM) for one in losses):
        raise InputError("source.init_args.landmarks: no loss asks where in a face a place is; leave them out")
    if isinstance(run.teacher, Nobody) and isinstance(source, OnlineSource) and source.resampling is not None:
        raise InputError("source.init_args.resampling goes by what a teacher says, and there is none")


def check_teacher(run: Run, objective: Objective, teacher: Recognizer) -> None:
    """Compare what the losses take the teacher for with what it is.

    Raises:
        InputError: naming the loss, or the setting, that does not fit.
    """
    pupils = []
    rule = None if run.adaptive is None else run.adaptive.rule
    for name, loss in objective.terms():
        if isinstance(run.teacher, Nobody) and loss.needs_teacher:
            raise InputError(f"losses.{name}: {type(loss).__name__} learns from a teacher, and there is none")
        if isinstance(loss, URFM) and loss.framing != teacher.spec.framing:
            raise InputError(
                f"losses.{name}: framing is {loss.framing}, and the teacher knows {teacher.spec.framing} crops"
            )
        if isinstance(loss, PromptGuard | EachPeer) and rule in ("matched", "literal"):
            raise InputError(
                f"adaptive.rule {rule} follows gradients of the student, and losses.{name} has none: "
                "use magnitude or learned, or weights that stay"
            )
        if isinstance(loss, FeatureLoss) and loss.teacher_learns:
            pupils.append(name)
    if pupils and run.prompts is None:
        raise InputError(f"losses.{pupils[0]}: teacher_learns is for a teacher with prompts; set prompts")
    if run.prompts is not None and not pupils:
        raise InputError("prompts: no loss lets the teacher learn; set teacher_learns of URFM")
    if run.prompts is not None and not any(isinstance(loss, PromptGuard) for _, loss in objective.terms()):
        raise InputError("prompts: nothing holds the teacher near what it knows; add a PromptGuard to the losses")


def mirrored(run: Run, objective: Objective) -> list[str]:
    """Losses between feature maps whose left is the teacher's right."""
    if run.teacher_sees == "view" or not run.augment.flip:
        return []
    return [name for name, loss in objective.terms() if loss.student_features and loss.teacher_features]
