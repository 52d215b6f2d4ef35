"""Meta-gradients by plain autograd, a Python loop over tasks and written-out layers.

Nothing of metarun is used but the data: forward passes name ``torch.nn.functional`` directly, batch
normalisation is torch's own (right outside of ``torch.func`` transforms), losses take class indices.
"""

import torch
import torch.nn.functional as F


def mlp_features(w, x, prefix="trunk."):
    layers = sorted(name.removesuffix(".weight") for name in w if name.endswith("weight") and "head" not in name)
    x = x.flatten(1)
    for layer in layers:
        x = F.relu(F.linear(x, w[f"{layer}.weight"], w[f"{layer}.bias"]))
    return x


def conv4_features(w, x, prefix="trunk."):
    for i in (0, 3, 6, 9):
        x = F.conv2d(x, w[f"{prefix}{i}.weight"], stride=2, padding=1)
        x = F.batch_norm(x, None, None, w[f"{prefix}{i + 1}.weight"], w[f"{prefix}{i + 1}.bias"], training=True)
        x = F.relu(x)
    return x.mean((2, 3))


def output(features, w, x):
    return F.linear(features(w, x), w["head.weight"], w["head.bias"])


def supervised_loss(prediction, y, kind):
    if kind == "regression":
        return ((prediction - y) ** 2).mean()
    return F.cross_entropy(prediction, y.argmax(1))


def split(tasks):
    count = len(tasks.support["x"])
    for t in range(count):
        yield tuple(part[name][t] for part in tasks[:2] for name in ("x", "y"))


def maml_gradient(features, weights, tasks, kind, inner_lr, inner_steps, first_order, adapts=lambda name: True):
    """Gradient of the mean query loss; ``inner_lr`` is a number, or one for each weight by name, then learned too."""
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    learned = isinstance(inner_lr, dict)
    rates = (
        {name: r.clone().requires_grad_() for name, r in inner_lr.items()}
        if learned
        else dict.fromkeys(weights, inner_lr)
    )
    total = 0
    for sx, sy, qx, qy in split(tasks):
        fast = dict(leaves)
        for _ in range(inner_steps):
            loss = supervised_loss(output(features, fast, sx), sy, kind)
            gradient = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            if first_order:
                gradient = [g.detach() for g in gradient]
            fast = {
                name: w - rates[name] * g if adapts(name) else w
                for (name, w), g in zip(fast.items(), gradient, strict=True)
            }
        total = total + supervised_loss(output(features, fast, qx), qy, kind)
    total = total / len(tasks.support["x"])
    gradients = iter(torch.autograd.grad(total, [*leaves.values(), *(rates.values() if learned else ())]))
    weights = {name: next(gradients) for name in leaves}
    return (weights, {name: next(gradients) for name in rates}) if learned else weights


def modulated_gradient(weights, own, tasks, kind, convolutional, inner_lr, inner_steps):
    """CAVIA and FiLM: inner steps on ``own`` from zero, the gradient with respect to the shared ``weights``."""
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}

    def changed(h, task_own, place):
        axes = (..., None, None) if h.ndim == 4 else ...
        if f"{place}.mix" in leaves:
            h = h + leaves[f"{place}.mix"] @ task_own[f"{place}.context"]
        if f"{place}.generate.weight" in leaves:
            made = F.linear(
                task_own[f"{place}.context"], *(leaves[f"{place}.generate.{p}"] for p in ("weight", "bias"))
            )
            h = made[: h.shape[1]][axes] * h + made[h.shape[1] :][axes]
        if f"{place}.scale" in task_own:
            h = h + h * task_own[f"{place}.scale"][axes] + task_own[f"{place}.shift"][axes]
        return h

    def predict(task_own, x):
        w = {name.replace(".layer.", "."): leaf for name, leaf in leaves.items()}
        if convolutional:
            for i in (0, 3, 6, 9):
                x = F.conv2d(x, w[f"trunk.{i}.weight"], stride=2, padding=1)
                norm = f"trunk.{i + 1}"
                x = F.batch_norm(x, None, None, w[f"{norm}.weight"], w[f"{norm}.bias"], training=True)
                x = F.relu(changed(x, task_own, norm))
            x = x.mean((2, 3))
        else:
            places = sorted({".".join(name.split(".")[:2]) for name in w if name.startswith("trunk.")})
            for place in places:
                x = F.relu(changed(F.linear(x, w[f"{place}.weight"], w[f"{place}.bias"]), task_own, place))
        return F.linear(x, w["head.weight"], w["head.bias"])

    total = 0
    for sx, sy, qx, qy in split(tasks):
        fast = {name: torch.zeros(shape, requires_grad=True) for name, shape in own.items()}
        for _ in range(inner_steps):
            loss = supervised_loss(predict(fast, sx), sy, kind)
            gradient = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {name: w - inner_lr * g for (name, w), g in zip(fast.items(), gradient, strict=True)}
        total = total + supervised_loss(predict(fast, qx), qy, kind) / len(tasks.support["x"])
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def implicit_gradient(
    features, weights, tasks, kind, inner_lr, inner_steps, strength, damping, official, hessian_damping
):
    """iMAML's meta-gradient with the Hessian of the support loss written out and the system solved directly.

    ``official`` is the inner loop of the official code: plain SGD, then one step of SGD on the proximal term alone.
    """
    names, total = list(weights), 0
    shapes = [weights[name].shape for name in names]

    def as_weights(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    start = torch.cat([weights[name].flatten() for name in names])
    for sx, sy, qx, qy in split(tasks):

        def support_loss(flat):
            return supervised_loss(output(features, as_weights(flat), sx), sy, kind)  # noqa: B023

        def proximal(flat):
            return strength / 2 * (flat - start).square().sum()

        def inner_problem(flat):
            return support_loss(flat) + proximal(flat)

        flat = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([flat], inner_lr)
        for objective in [support_loss] * inner_steps + [proximal] if official else [inner_problem] * inner_steps:
            optimizer.zero_grad()
            objective(flat).backward()
            optimizer.step()
        query = torch.autograd.grad(supervised_loss(output(features, as_weights(flat), qx), qy, kind), flat)[0]
        hessian = torch.autograd.functional.hessian(support_loss, flat.detach())
        system = (1 + damping) * torch.eye(len(flat)) + hessian / (strength + hessian_damping)
        total = total + torch.linalg.solve(system, query) / len(tasks.support["x"])
    return as_weights(total)


def reptile_gradient(features, weights, tasks, kind, inner_lr, inner_steps, inner_batch):
    """θ − mean of the weights that torch's own Adam with β1 = 0 arrives at."""
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    for sx, sy, _, _ in split(tasks):
        fast = {name: w.clone().requires_grad_() for name, w in weights.items()}
        optimizer = torch.optim.Adam(fast.values(), lr=inner_lr, betas=(0.0, 0.999), eps=1e-8)
        for k in range(inner_steps):
            rows = [(k * inner_batch + i) % len(sx) for i in range(min(inner_batch, len(sx)))]
            optimizer.zero_grad()
            supervised_loss(output(features, fast, sx[rows]), sy[rows], kind).backward()
            optimizer.step()
        for name, w in fast.items():
            total[name] += (weights[name] - w.detach()) / len(tasks.support["x"])
    return total


def protonet_gradient(features, weights, tasks):
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    total = 0
    for sx, sy, qx, qy in split(tasks):
        z = features(leaves, torch.cat([sx, qx]), prefix="")
        support, query = z[: len(sx)], z[len(sx) :]
        logits = []
        for k in range(sy.shape[1]):
            prototype = support[sy.argmax(1) == k].mean(0)
            logits.append(-((query - prototype) ** 2).sum(1))
        total = total + F.cross_entropy(torch.stack(logits, 1), qy.argmax(1))
    total = total / len(tasks.support["x"])
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def ridge_gradient(features, weights, solver, tasks, kind):
    """R2-D2 through the primal normal equations, whatever the sizes."""
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    learned = {name: w.clone().requires_grad_() for name, w in solver.items()}
    total = 0
    for sx, sy, qx, qy in split(tasks):
        z = features(leaves, torch.cat([sx, qx]), prefix="")
        z = torch.cat([z, torch.ones(len(z), 1)], 1) / len(sx) ** 0.5
        support, query = z[: len(sx)], z[len(sx) :]
        gram = support.T @ support + learned["log_strength"].exp() * torch.eye(z.shape[1])
        head = torch.linalg.inv(gram) @ support.T @ sy
        total = total + supervised_loss(learned["scale"] * query @ head + learned["shift"], qy, kind)
    total = total / len(tasks.support["x"])
    everything = [*leaves.values(), *learned.values()]
    gradients = iter(torch.autograd.grad(total, everything))
    return {name: next(gradients) for name in leaves}, {name: next(gradients) for name in learned}


def kind_of(family):
    """What ``supervised_loss`` calls the kind of target of a family."""
    return "classification" if family.spec.offers("classes") else "regression"
