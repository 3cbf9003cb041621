"""What deploy/ says: linted, held to its schemas and to covo-serve itself; the steps of Dockerfile.cpu, run.

No image is built here: there is no container engine.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import click
import pytest
from ray._common.utils import import_attr
from ray.serve.schema import ServeDeploySchema

from covo_npu.serve.cli import command

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cpu"]
BIN = Path(sys.executable).parent

yaml = pytest.importorskip("yaml", reason="extra dev")


def instructions(path):
    """Return the (instruction, value) pairs of a Dockerfile, comments gone, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def manifests():
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def ray_service():
    """Return the RayService, and the configuration of Ray Serve in it."""
    service = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    return service, yaml.safe_load(service["spec"]["serveConfigV2"])


def ray_pods():
    """Return the templates of the pods of Ray: the head's, then the workers'."""
    cluster = ray_service()[0]["spec"]["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def serves():
    """Yield where it is said, and the arguments of covo-serve, wherever deploy/ starts it."""
    for path in DOCKERFILES:
        (line,) = [value for name, value in instructions(path) if name == "CMD"]
        yield path.name, yaml.safe_load(line)
    yield "kubernetes.yaml", manifests()[0]["spec"]["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_pass_hadolint(path):
    done = subprocess.run([BIN / "hadolint", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_notices_a_fault(tmp_path):
    wrong = DOCKERFILES[1].read_text().replace("USER 10001\n", "").replace("apt-get install -y", "apt-get install")
    (tmp_path / "Dockerfile").write_text(wrong)
    done = subprocess.run([BIN / "hadolint", tmp_path / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 1 and "DL3014" in done.stdout


def test_compose_follows_its_schema(tmp_path):
    check = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, DEPLOY / "compose.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DEPLOY / "compose.yaml").read_text().replace("restart:", "restarts:"))
    assert subprocess.run([*check, wrong], capture_output=True).returncode == 1


def test_kubernetes_follows_its_schema(tmp_path):
    check = [BIN / "kubernetes-validate", "--strict"]
    done = subprocess.run([*check, DEPLOY / "kubernetes.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "kubernetes.yaml"
    wrong.write_text((DEPLOY / "kubernetes.yaml").read_text().replace("readinessProbe", "readyProbe"))
    assert subprocess.run([*check, wrong], capture_output=True).returncode != 0


def fields(required, **properties):
    """Return the schema of an object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


# What rayservice.yaml may say, but for its pods; from ray.io_rayservices.yaml of KubeRay, v1. Of its fields only those
# that are used.
WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
NUMBER, TEXT, PODS = {"type": "integer"}, {"type": "string"}, {"type": "object"}
HEAD = fields(["rayStartParams", "template"], rayStartParams=WORDS, template=PODS)
WORKERS = fields(
    ["groupName", "maxReplicas", "minReplicas", "template"],
    groupName=TEXT, replicas=NUMBER, minReplicas=NUMBER, maxReplicas=NUMBER, rayStartParams=WORDS, template=PODS,
)  # fmt: skip
RAY_CLUSTER = fields(
    ["headGroupSpec"], rayVersion=TEXT, headGroupSpec=HEAD, workerGroupSpecs={"type": "array", "items": WORKERS}
)
RAY_SERVICE = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=fields(["name"], name=TEXT, labels=WORDS, annotations=WORDS),
    spec=fields(["rayClusterConfig"], serveConfigV2=TEXT, rayClusterConfig=RAY_CLUSTER),
)


def test_the_ray_service_follows_its_schema(tmp_path):
    schema, wrong = tmp_path / "schema.json", tmp_path / "wrong.yaml"
    schema.write_text(json.dumps(RAY_SERVICE))
    wrong.write_text((DEPLOY / "rayservice.yaml").read_text().replace("minReplicas: 2", "minReplica: 2"))
    check = [BIN / "check-jsonschema", "--schemafile", schema]
    done = subprocess.run([*check, DEPLOY / "rayservice.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert subprocess.run([*check, wrong], capture_output=True).returncode == 1


@pytest.mark.parametrize("number", [0, 1], ids=["head", "worker"])
def test_the_pods_of_ray_follow_their_schema(number, tmp_path):
    template = ray_pods()[number]
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "ray"}, "template": template}
    right, wrong = tmp_path / "right.yaml", tmp_path / "wrong.yaml"
    right.write_text(yaml.safe_dump(pod))
    wrong.write_text(yaml.safe_dump(pod).replace("livenessProbe", "aliveProbe"))
    check = [BIN / "kubernetes-validate", "--strict"]
    done = subprocess.run([*check, right], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert subprocess.run([*check, wrong], capture_output=True).returncode != 0


def test_ray_serve_takes_what_the_ray_service_says():
    """Its own schema, the builder that it names, and what is said of the cards."""
    service, config = ray_service()
    (application,) = ServeDeploySchema.model_validate(config).applications
    built = import_attr(application.import_path)(application.args)._bound_deployment
    (deployment,) = application.deployments
    assert deployment.name == built.name
    cluster = service["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    said = workers["rayStartParams"]
    there = {"num_cpus": int(said["num-cpus"]), "resources": json.loads(json.loads(said["resources"]))}
    assert built.ray_actor_options == there  # one replica a worker, and no room for a second
    assert workers["replicas"] == workers["minReplicas"] == deployment.num_replicas
    assert cluster["rayVersion"] in (ROOT / "constraints.txt").read_text().partition("\nray==")[2].partition(";")[0]
    head, worker = ray_pods()
    limits = worker["spec"]["containers"][0]["resources"]["limits"]
    assert [limits[name] for name in limits if "/" in name] == [there["resources"]["NPU"]]
    assert worker["spec"]["terminationGracePeriodSeconds"] > built.init_args[0].settings.drain_s
    for pod in (head, worker):
        (container,) = pod["spec"]["containers"]
        assert container["command"][0] == "covo-entrypoint" and container["env"][0]["name"] == "COVO_API_KEY"
        assert "KUBERAY_GEN_RAY_START_CMD" in container["args"][0]
        (ckpt,) = [mount for mount in container["volumeMounts"] if mount["name"] == "ckpt"]
        assert ckpt == {"name": "ckpt", "mountPath": application.args["ckpt"], "readOnly": True}
        assert str(pod["spec"]["securityContext"]["runAsUser"]) == dict(instructions(DOCKERFILES[0]))["USER"]
    with pytest.raises(ValueError, match="--no-such-option"):
        import_attr(application.import_path)({**application.args, "no_such_option": 1})


@pytest.mark.parametrize(("where", "arguments"), list(serves()), ids=[where for where, _ in serves()])
def test_covo_serve_takes_the_arguments(where, arguments):
    name, *options = arguments
    assert name == "covo-serve"
    parsed = command.make_context(name, options)
    assert str(parsed.params["ckpt"]) == "/ckpt" and parsed.params["host"] == "0.0.0.0"
    with pytest.raises(click.UsageError):
        command.make_context(name, [*options, "--no-such-option"])


def test_the_files_agree_with_one_another_and_with_the_server():
    pod = manifests()[0]["spec"]["template"]
    container = pod["spec"]["containers"][0]
    (port,) = {port["containerPort"] for port in container["ports"]}
    assert port == next(p for p in command.params if p.name == "port").default
    for path in DOCKERFILES:
        said = dict(instructions(path))
        assert said["EXPOSE"] == str(port) and f":{port}/health" in said["HEALTHCHECK"]
        assert said["USER"] == str(pod["spec"]["securityContext"]["runAsUser"])
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(port)
    app = (ROOT / "serve/app.py").read_text()
    probes = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    for route in (*probes, "/health", pod["metadata"]["annotations"]["prometheus.io/path"]):
        assert f'Route("{route}"' in app
    drain = float(container["args"][container["args"].index("--drain-s") + 1])
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert drain + pause < pod["spec"]["terminationGracePeriodSeconds"]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in compose["services"].values():
        usual = next(p for p in command.params if p.name == "drain_s").default
        assert usual < float(service["stop_grace_period"].removesuffix("s"))
        assert (DEPLOY.parent / service["build"]["dockerfile"]) in DOCKERFILES
        assert service["volumes"][0].endswith(":/ckpt:ro")


def test_weights_are_never_built_in():
    """The licence of the weights: they are mounted. What the build may see is a list of folders of code."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert (ROOT / ".dockerignore").read_text().splitlines()[0] == "*"
    assert not {"checkpoints", "tests", "demo", "replies"} & set(allowed)


def test_the_entry_point_sources_cann_and_becomes_the_command(tmp_path):
    script = (DEPLOY / "entrypoint.sh").read_text()
    cann = tmp_path / "cann/set_env.sh"
    cann.parent.mkdir()
    cann.write_text("export ASCEND_HOME=here\n")
    mine = tmp_path / "entrypoint.sh"
    mine.write_text(script.replace("/usr/local/Ascend", str(tmp_path)))
    program = "import os; print(os.environ.get('ASCEND_HOME'), os.getpid())"
    for home in ("here", "None"):
        with subprocess.Popen(["sh", mine, sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.read().split() == [home, str(child.pid)]  # no shell in between
        cann.unlink(missing_ok=True)


@pytest.mark.install
def test_the_steps_of_the_cpu_image_install_a_server_that_answers(tmp_path, convert_tiny):
    """RUN pip ..., from the files that the build may see; apt-get and useradd belong to the image and are left out."""
    source, wheels = tmp_path / "src", tmp_path / "wheel"
    for name in (line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, target)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    said = dict(value.split("=", 1) for name, value in instructions(DOCKERFILES[1]) if name == "ARG")
    environment = {**os.environ, **said, "PATH": f"{tmp_path}/env/bin:{os.environ['PATH']}", "PIP_NO_INPUT": "1"}
    environment.pop("PYTHONPATH", None)
    steps = [value for name, value in instructions(DOCKERFILES[1]) if name == "RUN"]
    ours = [re.sub(r"^--mount=\S+\s+", "", step) for step in steps if "pip " in step]
    assert len(ours) == 3 and len(steps) == 5
    for step in ours:
        step = step.replace("/src", str(source)).replace("/wheel", str(wheels))
        done = subprocess.run(["sh", "-ec", step], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"
    (line,) = [value for name, value in instructions(DOCKERFILES[1]) if name == "CMD"]
    arguments = [a.replace("/ckpt", str(convert_tiny("float32"))) for a in yaml.safe_load(line)]
    start = [tmp_path / "env/bin" / arguments[0], *arguments[1:], "--port", "8765", "--api-key", "k"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(start, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not answers("http://127.0.0.1:8765/ready"):
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) in (0, 143), (tmp_path / "log").read_text()


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError):
        return False
