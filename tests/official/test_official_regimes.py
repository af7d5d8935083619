"""Losses of other regimes against the code their authors published: A-SKD, PocketNet, mutual learning, assistants."""

import types
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import faceless
from distill.losses.attention import AttentionSimilarity
from distill.losses.embedding import FeatureL2
from distill.losses.logits import CrossEntropy, LogitKD
from distill.losses.margin import ArcFace
from distill.losses.mutual import DeepMutual
from faceless.recognizer import Output, Recognizer

pytestmark = pytest.mark.official

ASKD = "utility/distill_loss.py"
CLASSES, DIM = 30, 16
KINDS = ("channel", "spatial")


def test_attention_similarity_of_cbam_outputs(official, parity):
    """Maps over channels and over places of two blocks, as their hooks find them."""
    module = official("gist-ailab/teaching-where-to-look", ASKD)
    theirs = module.DistillLoss(types.SimpleNamespace(distill_attn_param=5.0), "cpu")
    shapes = {"channel 1": (6, 8, 1, 1), "place 1": (6, 1, 7, 5), "channel 2": (6, 4, 1, 1), "place 2": (6, 1, 3, 3)}
    high = {name: torch.randn(shape) for name, shape in shapes.items()}
    low = {name: torch.randn(shape) for name, shape in shapes.items()}
    ours = AttentionSimilarity(student_layers=list(shapes), teacher_layers=list(shapes))
    blank = torch.zeros(6, 2)
    parity(
        "A-SKD attention, weight 5",
        f"gist-ailab/teaching-where-to-look {ASKD}",
        lambda *maps: 5 * ours(Output(blank, features=dict(zip(shapes, maps))), Output(blank, features=high)),
        lambda *maps: theirs(maps, list(high.values())),
        *low.values(),
    )


def test_attention_of_their_network(official, parity):
    """All 48 maps of the two CBAM-IResNets, as hooks find them there and as features are asked for here."""
    build = official("gist-ailab/teaching-where-to-look", "model/backbone.py").CBAMResNet
    watch = official("gist-ailab/teaching-where-to-look", "utility/hook.py").attention_manager
    module = official("gist-ailab/teaching-where-to-look", ASKD)
    theirs = module.DistillLoss(types.SimpleNamespace(distill_attn_param=5.0), "cpu")
    nets, ours, seen = [build(50).double().eval() for _ in range(2)], [], []
    for net in nets:
        own = faceless.create("cbam50").double().eval()
        own.backbone.load_state_dict(net.state_dict())
        ours.append(own)
        net.output_layer = nn.Identity()  # which fits 112 pixels only
        own.backbone.output_layer = nn.Flatten()
        seen.append(watch(net, False))
    layers = [f"layer{i + 1}.{j}.{kind}_layer" for i in range(4) for j in range((3, 4, 14, 3)[i]) for kind in KINDS]
    high, loss = torch.randn(2, 3, 32, 32), AttentionSimilarity(student_layers=layers, teacher_layers=layers)

    def published(low: Tensor) -> Tensor:
        for net, manager, x in zip(nets, seen, (low, high)):
            manager.attention = []
            net(x)
        student, teacher = ([part for pair in manager.attention for part in pair] for manager in seen)
        return theirs(student, [x.detach() for x in teacher])

    def looked(net: Recognizer, x: Tensor) -> Output:
        found: dict[str, Tensor] = {}
        hooks = [
            net.backbone.get_submodule(name).register_forward_hook(lambda _m, _i, y, key=name: found.update({key: y}))
            for name in layers
        ]
        embedding = net.backbone(x)
        for hook in hooks:
            hook.remove()
        return Output(embedding, features=found)

    parity(
        "A-SKD, all maps of CBAM-IResNet-50",
        f"gist-ailab/teaching-where-to-look {ASKD}",
        lambda low: 5 * loss(looked(ours[0], low), looked(ours[1], high)),
        published,
        torch.randn(2, 3, 32, 32),
    )


def test_multi_step_distillation(official, parity):
    """PocketNet's objective at one step: ArcFace and 100 times the mean squared distance to the epoch's teacher."""
    module = official("fdbtrs/PocketNet", "utils/losses.py")
    head = module.ArcFace(DIM, CLASSES).double()
    ours = ArcFace(embedding_dim=DIM, classes=CLASSES, gradient="exact").double()
    ours.centers.data.copy_(head.kernel.detach().T)
    S, T, labels = torch.randn(24, DIM), torch.randn(24, DIM), torch.randint(CLASSES, (24,))
    distance = FeatureL2(form="unit-mean")

    def published(student: Tensor) -> Tensor:  # as train_multi_step_kd.py has it
        unit = F.normalize(student)
        return F.cross_entropy(head(unit, labels), labels) + 100 * nn.MSELoss()(unit, F.normalize(T))

    parity(
        "PocketNet multi-step",
        "fdbtrs/PocketNet utils/losses.py",
        lambda s: ours(Output(s), Output(T), labels) + 100 * distance(Output(s), Output(T)),
        published,
        S,
    )


@pytest.mark.parametrize("peers", [1, 2])
def test_deep_mutual_learning(official, parity, peers):
    """Its loops over networks on TensorFlow's few functions; it sums over the others, the paper and we average."""
    tf = ModuleType("tensorflow")
    tf.contrib = types.SimpleNamespace(slim=None)
    tf.app = types.SimpleNamespace(flags=types.SimpleNamespace(FLAGS=None))
    tf.nn = types.SimpleNamespace(softmax=lambda z: z.softmax(1))
    tf.log, tf.reduce_mean = torch.log, torch.mean
    tf.reduce_sum = lambda x, axis: x.sum(axis)
    stubs = {"tensorflow": tf}
    for name, attributes in (
        ("datasets", {"dataset_factory": None}),
        ("datasets.utils", {}),
        ("deployment", {"model_deploy": None}),
        ("nets", {"nets_factory": None}),
        ("preprocessing", {"preprocessing_factory": None}),
    ):
        stubs[name] = ModuleType(name)
        stubs[name].__dict__.update(attributes)
    module = official("YingZhangDUT/Deep-Mutual-Learning", "train_models.py", stubs)
    ours = DeepMutual(embedding_dim=DIM, classes=CLASSES, peers=peers, scale=4.0).double()
    nets, labels = [torch.randn(12, DIM) for _ in range(peers + 1)], torch.randint(CLASSES, (12,))

    def published(*embeddings: Tensor) -> Tensor:
        scores = [4 * classifier(x) for classifier, x in zip(ours.classifiers, embeddings)]
        total = sum(F.cross_entropy(z, labels) for z in scores)
        for i, mine in enumerate(scores):
            for j, other in enumerate(scores):
                if i != j:
                    total = total + module.kl_loss_compute(mine, other.detach()) / peers
        return total

    parity(
        f"DML, {peers + 1} networks",
        "YingZhangDUT/Deep-Mutual-Learning train_models.py",
        lambda s, *rest: ours(
            Output(s, features={f"peers.{i}": x for i, x in enumerate(rest)}), Output(torch.zeros(12, 2)), labels
        ),
        published,
        *nets,
        tolerance=2e-6,  # its 1e-8 beside each probability
    )


def test_teacher_assistant_step(official):
    """One step of its trainer moves a linear student as our two losses do; its KL is divided by the classes too."""
    stubs = {name: ModuleType(name) for name in ("nni", "data_loader", "model_factory")}
    stubs["data_loader"].get_cifar = stubs["model_factory"].create_cnn_model = stubs["model_factory"].is_resnet = None
    module = official("imirzadeh/Teacher-Assistant-Knowledge-Distillation", "train.py", stubs)
    student, teacher = nn.Linear(DIM, CLASSES), nn.Linear(DIM, CLASSES)
    x, labels, weight, temperature = torch.randn(8, DIM), torch.randint(CLASSES, (8,)), 0.4, 5.0
    scores, taught = student(x), teacher(x)
    ours = (1 - weight) * CrossEntropy()(Output(scores, scores), Output(taught, taught), labels) + (
        weight / CLASSES
    ) * LogitKD(temperature=temperature)(Output(scores, scores), Output(taught, taught))
    expected = torch.autograd.grad(ours, list(student.parameters()))
    before = [p.detach().clone() for p in student.parameters()]
    config = {"device": "cpu", "name": "s", "learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    config |= {"lambda_student": weight, "T_student": temperature, "epochs": 1, "trial_id": "t", "is_plane": True}
    trainer = module.TrainManager(student, teacher, [(x, labels)], [(x, labels)], config)
    trainer.save = lambda *args, **kwargs: None
    trainer.train()
    for old, new, gradient in zip(before, student.parameters(), expected):
        torch.testing.assert_close((old - new.detach()) / 0.01, gradient, rtol=1e-6, atol=1e-9)
