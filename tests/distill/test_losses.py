"""What every loss must survive, whatever its formula."""

import importlib
import inspect
import io
import pkgutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distill.losses
from distill.losses.base import FaceLoss, Loss
from distill.losses.margin import sampled_classes
from distill.losses.relational import SimilarityToMemory
from faceless.recognizer import Output
from tests.distill.every_loss import ANY_DIM, EVERY, HEADS, STRAIGHT_THROUGH, faces, output, value

every = pytest.mark.parametrize("name", EVERY)


def after(name: str, dim: int, steps: int = 2):
    """The loss after some steps, so that its memory is not empty."""
    loss = EVERY[name](dim)
    for step in range(steps):
        value(loss, *faces(5, dim, 100 + step))
    return loss


@pytest.mark.parametrize("name", sorted(set(EVERY) - STRAIGHT_THROUGH))
def test_gradient_is_the_derivative(name):
    loss = after(name, 7).double().eval()
    S, T, labels = faces(6, 7, 0, torch.float64)
    assert torch.autograd.gradcheck(lambda x: value(loss, x, T, labels), S.requires_grad_())


@pytest.mark.parametrize("name", sorted(STRAIGHT_THROUGH))
def test_straight_through_gradient_is_that_of_constants_held_fixed(name):
    """What these take as constant (margins' shifts, CRD's other view) is held while the differences are taken."""
    loss = after(name, 7).double().eval()
    S, T, labels = faces(6, 7, 0, torch.float64)
    x = S.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(loss, x, T, labels), x)
    surrogate = held_fixed(name, loss, S, T, labels)
    assert surrogate(S).item() == pytest.approx(value(loss, S, T, labels).item(), rel=1e-9)
    step = 1e-5 * torch.eye(S.numel(), dtype=torch.float64).view(-1, *S.shape)
    slopes = torch.stack([(surrogate(S + d) - surrogate(S - d)) / 2e-5 for d in step]).view_as(S)
    torch.testing.assert_close(found, slopes, rtol=1e-5, atol=1e-6)


def held_fixed(name, loss, S, T, labels):
    """The loss as a function of the student, written out, with its constants computed at ``S``."""
    unit = torch.nn.functional.normalize
    if name == "crd":
        projection = loss.student_projection
        s0, t = unit(projection(S)), unit(loss.teacher_projection(T))
        noise = loss.log_mean.exp() * len(loss.teachers)

        def crd(x):
            s, total = unit(projection(x)), 0.0
            # The second side's anchor is the teacher: of the student it sees a constant.
            for a, b, memory, c in ((s, t, loss.teachers, noise[0]), (t, s0, loss.students, noise[1])):
                near = ((a * b).sum(1) / 0.07).exp()
                far = (a @ memory.valid().T / 0.07).exp()
                total = total - (near / (near + c)).log().mean() - (c / (far + c)).log().sum(1).mean()
            return total

        return crd
    if name in ("mutual", "deep-mutual"):
        return taught_by_constants(name, loss, S, labels)
    if name in ("self", "self-labels"):
        return exits_taught_by_constants(loss, S, T, labels)
    head = loss.recognition if name == "unified-labels" else loss
    centers, places = head.centers.detach(), labels
    if name == "arcface-sampled":
        chosen = sampled_classes(labels, 6, 2, head.seed, head.step)[0].unique()
        places, centers = torch.searchsorted(chosen, labels), centers[chosen]
    cosines0 = unit(S) @ unit(centers).T
    one_hot = torch.nn.functional.one_hot(places, len(centers)).to(S)

    def softmax(x):
        shift = one_hot * ((cosines0.clamp(-1, 1).acos() + 0.5).cos() - cosines0)
        logits = 64 * (unit(x) @ unit(centers).T + shift)
        return (logits.logsumexp(1) - (logits * one_hot).sum(1)).mean()

    def spheres(x):
        sign = 2 * one_hot - 1
        shift = 2 * ((cosines0 + 1) / 2) ** 3 - 1 - 0.4 * sign - cosines0
        logits = 40 * (unit(x) @ unit(centers).T + shift) + head.bias.detach()
        weights = 0.7 * one_hot + 0.3 * (1 - one_hot)
        total = (50 / 40 * weights * torch.nn.functional.softplus(-sign * logits)).sum(1).mean()
        if name == "unified-labels":
            rest = (loss.iled, 20), (loss.rpsd, 40)
            total = total + sum(weight * value(part, x, T) for part, weight in rest)
        return total

    return softmax if name.startswith("arc") else spheres


def taught_by_constants(name, loss, S, labels):
    unit = torch.nn.functional.normalize

    def networks(x):
        everyone = [unit(net) for net in (x, x, x.flip(1))]
        if name == "deep-mutual":
            return [32 * net @ unit(c.centers.detach()).T for net, c in zip(everyone, loss.classifiers)]
        return everyone

    at = networks(S)

    def students(x):
        nets, total = networks(x), 0.0
        for i, mine in enumerate(nets):
            for other in at[:i] + at[i + 1 :]:
                if name == "mutual":
                    total = total + (1 - (mine * other).sum(1)).mean() / 2
                else:
                    p = other.softmax(1)
                    total = total + (p * (p.log() - mine.log_softmax(1))).sum(1).mean() / 2
            if name == "deep-mutual":
                total = total - mine.log_softmax(1)[range(len(S)), labels].mean()
        return total

    return students


def exits_taught_by_constants(loss, S, T, labels):
    cosine, pool = torch.nn.functional.cosine_similarity, torch.nn.functional.adaptive_avg_pool2d

    def students(x):
        total = 0.0
        for i, name in enumerate(("map", "wide")):
            e = pool(output(x).features[name], 4).flatten(1) @ loss.exits[i].linear.weight.detach().T
            total = total + 0.03 * (e - S).square().mean()
            if loss.classes is None:
                total = total + 0.7 * (1 - cosine(e, T)).mean() + 0.3 * (1 - cosine(e, S)).mean()
            else:
                p, q = (scores(net, y).log_softmax(1) for net, y in ((0, S), (i + 1, e)))
                total = total - 0.7 * q[range(len(S)), labels].mean() + 0.3 * (p.exp() * (p - q)).sum(1).mean()
        if loss.classes is not None:
            total = total - scores(0, x).log_softmax(1)[range(len(S)), labels].mean()
        return total

    def scores(number, x):
        unit = torch.nn.functional.normalize
        return 32 * unit(x) @ unit(loss.classifiers[number].centers.detach()).T

    return students


def test_no_loss_is_left_out():
    def kinds(kind):
        for below in kind.__subclasses__():
            yield from (below, *kinds(below))

    for module in pkgutil.iter_modules(distill.losses.__path__, "distill.losses."):
        importlib.import_module(module.name)
    ours = {kind for kind in kinds(Loss) if kind.__module__.startswith("distill.") and not inspect.isabstract(kind)}
    assert ours == {type(make(6)) for make in EVERY.values()}


@every
@settings(deadline=None, max_examples=8)
@given(batch=st.integers(0, 9), dim=st.integers(2, 9), scale=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 99))
def test_finite_for_every_shape_and_scale(name, batch, dim, scale, seed):
    dim = max(dim, 3) if name == "von-mises-fisher-kl" else dim  # which has no formula for a circle
    loss = after(name, dim)
    S, T, labels = faces(batch, dim, seed, scale=scale)
    result = value(loss, S.requires_grad_(), T, labels)
    result.backward()
    assert result.shape == () and result.isfinite() and S.grad.isfinite().all()


@every
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_zero_vectors_and_duplicates_stay_finite(name, which):
    loss = after(name, 7)
    S, T, labels = faces(8, 7, 1)
    if which != "teacher":
        S[3], S[5], S[6] = 0, S[2], S[2] * (1 + 1e-7)
    if which != "student":
        T[3], T[5] = 0, T[2]
    result = value(loss, S.requires_grad_(), T, labels)
    result.backward()
    assert result.isfinite() and S.grad.isfinite().all()
    # Bounded too, where zero vectors do not give 1 / 0: two faces that coincide must not blow a step up.
    rows = [i for i in range(8) if i != 3]
    assert S.grad[rows].abs().max() < 1e4


@every
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_a_first_step_finds_empty_memories_and_untouched_centers(name, batch):
    """Batches of none, of one, and of five pictures of one person."""
    loss = EVERY[name](7)
    S, T, labels = faces(batch, 7, 9)
    for _ in range(2):
        value(loss, S.requires_grad_(), T, torch.full_like(labels, 2)).backward()
        assert S.grad.isfinite().all()
    assert value(loss.eval(), S, T, torch.full_like(labels, 2)).isfinite()
    assert all(item.isfinite().all() for item in loss.state_dict().values())


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(name, dtype):
    S, T, labels = faces(6, 7, 2)
    S, T = S.to(dtype), T.to(dtype)
    expected = value(after(name, 7), S.float(), T.float(), labels)
    low = S.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = value(after(name, 7), low, T, labels)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected)
    result.backward()
    assert low.grad.dtype == dtype and low.grad.isfinite().all()


@every
def test_no_gradient_for_the_teacher_and_inference_tensors_are_welcome(name):
    S, T, labels = faces(6, 7, 3)
    with torch.inference_mode():
        frozen = T.clone()
    value(after(name, 7), S.clone().requires_grad_(), frozen, labels).backward()
    T.requires_grad_()
    value(after(name, 7), S.clone().requires_grad_(), T, labels).backward()
    assert T.grad is None or name == "prompt-guard"  # which is there for what the teacher learns


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"arcdistill", "cosdistill", "arcdistill-sampled"}))
def test_a_loss_that_needs_no_teacher_does_not_look_at_it(name):
    """And all others do; frozen centers are a teacher's too, seen before."""
    S, T, labels = faces(6, 7, 3)
    found = [value(after(name, 7), S, said, labels) for said in (T, faces(6, 7, 4)[1])]
    assert torch.equal(*found) != EVERY[name](7).needs_teacher


@every
def test_resumed_in_the_middle_goes_on_the_same(name):
    run = EVERY[name](7)
    batches = [faces(6, 7, step) for step in range(6)]
    before = [value(run, *batch) for batch in batches[:3]]
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    resumed = EVERY[name](7)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches[3:]:
        assert torch.equal(value(run, *batch), value(resumed, *batch))
    assert all(x.isfinite() for x in before)


@every
def test_evaluation_changes_nothing(name):
    loss = after(name, 7).eval()
    state = {key: item.clone() for key, item in loss.state_dict().items()}
    value(loss, *faces(6, 7, 4))
    assert all(torch.equal(item, state[key]) for key, item in loss.state_dict().items())


@pytest.mark.parametrize(
    "name",
    sorted(
        set(EVERY)
        - HEADS
        - {"crd", "kd", "dkd", "nkd", "hint-adapted", "hints", "attention", "attention-similarity", "attention-spatial"}
        - {"kd-standardized", "kd-adversarial", "urfm", "mutual", "deep-mutual", "prompt-guard"}
        - {"self", "self-labels"}
    ),
)
def test_training_on_it_moves_the_student_to_the_teacher(name):
    """A linear student learns from new faces at each step; it must relate unseen ones as the teacher does."""
    random = torch.Generator().manual_seed(0)
    W, M = torch.randn(6, 6, generator=random), torch.randn(6, 6, generator=random)
    W.requires_grad_()
    unseen = torch.randn(64, 6, generator=random)
    loss, optimizer = EVERY[name](6), torch.optim.Adam([W], 0.03)

    def distance() -> float:
        s, t = (torch.nn.functional.normalize(unseen @ net.detach()) for net in (W, M))
        return (s @ s.T - t @ t.T).square().mean().item()

    first = distance()
    for _ in range(300):
        x = torch.randn(16, 6, generator=random)
        optimizer.zero_grad()
        value(loss, x @ W, x @ M, (x @ M).argmax(1)).backward()
        optimizer.step()
    assert distance() < 0.3 * first


@every
def test_weights_multiply_the_term_of_a_face_or_are_refused(name):
    """The term of a face is the loss of that face alone; what is no mean of such terms has none to weight."""
    loss = after(name, 7).double().eval()
    S, T, labels = faces(6, 7, 5, torch.float64)
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, 7.0, 1e-3], dtype=torch.float64)
    if not isinstance(loss, FaceLoss):
        labels = labels.clamp(max=5)
        with pytest.raises(ValueError, match=f"{type(loss).__name__} is no mean over single faces"):
            loss(output(S), output(T), labels, weights)
        return
    terms = torch.stack([value(loss, S[i : i + 1], T[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(loss(output(S), output(T), weights=weights), (weights * terms).sum() / 6)
    torch.testing.assert_close(loss(output(S), output(T), weights=torch.ones(6)), value(loss, S, T))
    with pytest.raises(ValueError, match="weights are"):
        loss(output(S), output(T), weights=weights[:3])


@every
@pytest.mark.parametrize(("student", "teacher"), [((4, 7), (5, 7)), ((7,), (7,)), ((2, 4, 7), (2, 4, 7))])
def test_refuses_shapes_that_do_not_fit(name, student, teacher):
    with pytest.raises(ValueError, match=r"\[B, D\]"):
        value(EVERY[name](7), torch.zeros(student), torch.zeros(teacher))


@every
def test_another_student_dimension(name):
    S, T, labels = faces(6, 7, 6)
    if name in ANY_DIM:
        assert value(EVERY[name](7), S[:, :5], T, labels).isfinite()
    else:
        with pytest.raises(ValueError, match="5"):
            value(after(name, 7), S[:, :5], T, labels)


def test_paired_memory_takes_another_student_dimension():
    loss = SimilarityToMemory(embedding_dim=7, size=8, paired=True, student_dim=5)
    S, T, _ = faces(6, 7, 6)
    assert value(loss, S[:, :5], T) == 0
    assert value(loss, S[:, :5], T) > 0


@pytest.mark.parametrize("name", sorted(HEADS | {"dkd", "nkd", "unified-labels"}))
def test_faces_without_a_label_do_not_count(name):
    S, T, labels = faces(6, 7, 7)
    loss, again = EVERY[name](7).eval(), EVERY[name](7).eval()
    some = labels.clone()
    some[[1, 4]] = -1
    kept = [0, 2, 3, 5]
    if name != "unified-labels":  # two of whose terms need no label
        torch.testing.assert_close(value(loss, S, T, some), value(again, S[kept], T[kept], labels[kept]))
        assert value(loss, S, T, torch.full_like(labels, -1)) == 0
    with pytest.raises(ValueError, match="labels"):
        loss(Output(S, S), Output(T, T))
    with pytest.raises(ValueError, match="labels"):
        loss(Output(S, S), Output(T, T), labels + 10)
    with pytest.raises(ValueError, match="labels"):
        loss(Output(S, S), Output(T, T), labels[:3])


@pytest.mark.parametrize("name", sorted(HEADS - {"arcdistill", "arcdistill-sampled", "cosdistill", "cross-entropy"}))
def test_a_head_learns_to_tell_people_apart(name):
    random = torch.Generator().manual_seed(0)
    people = torch.nn.functional.normalize(torch.randn(6, 12, generator=random))
    W = torch.randn(12, 8, generator=random).requires_grad_()
    M = torch.randn(12, 8, generator=random)
    loss = EVERY[name](8)
    optimizer = torch.optim.Adam([W, *loss.parameters()], 0.03)

    def draw(count: int):
        labels = torch.randint(0, 6, (count,), generator=random)
        return people[labels] + 0.2 * torch.randn(count, 12, generator=random), labels

    x, labels = draw(200)

    def contrast() -> float:
        s = torch.nn.functional.normalize(x @ W.detach())
        same = labels.unsqueeze(1) == labels
        return ((s @ s.T)[same].mean() - (s @ s.T)[~same].mean()).item()

    first = contrast()
    for _ in range(200):
        faces_, people_ = draw(16)
        optimizer.zero_grad()
        value(loss, faces_ @ W, faces_ @ M, people_).backward()
        optimizer.step()
    assert contrast() > first + 0.15


def test_logits_that_are_missing_or_differ_are_refused():
    S, T, labels = faces(6, 7, 7)
    for name in ("kd", "dkd", "nkd", "cross-entropy"):
        with pytest.raises(ValueError, match="logits"):
            EVERY[name](7)(Output(S), Output(T), labels)
    for name in ("kd", "dkd", "nkd"):
        with pytest.raises(ValueError, match="logits"):
            EVERY[name](7)(Output(S, S), Output(T, T[:, :5]), labels.clamp(max=4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every
def test_a_gpu_gives_what_the_cpu_gives(name):
    here, there = EVERY[name](7).double(), EVERY[name](7).double().cuda()
    for step in range(4):
        S, T, labels = faces(6, 7, step, torch.float64)
        expected = value(here, S, T, labels)
        found = value(there, S.cuda(), T.cuda(), labels.cuda())
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-12)
