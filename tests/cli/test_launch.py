"""The launch scripts: no complaint of shellcheck, the right commands in a dry run, a valid manifest.

The schema is our own, of the fields that this manifest needs: JobSet's isn't published as a package.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from v2t_jax.config import load_recipe

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]


def fields(properties, required=None):
    return {"type": "object", "properties": properties, "required": required or list(properties)}


def items(of, least=1):
    return {"type": "array", "items": of, "minItems": least}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
CONTAINER = fields(
    {
        "name": TEXT,
        "image": TEXT,
        "workingDir": {"pattern": "^/"},
        "command": items(TEXT),
        "args": items(TEXT),
        "ports": items(fields({"containerPort": COUNT})),
        "resources": fields({name: fields({"google.com/tpu": COUNT}) for name in ("requests", "limits")}),
        "volumeMounts": items(fields({"name": TEXT, "mountPath": {"pattern": "^/"}})),
    }
)
POD = fields(
    {
        "restartPolicy": {"enum": ["Never"]},  # the JobSet starts all pods again, never one alone
        "terminationGracePeriodSeconds": {"type": "integer", "minimum": 30},
        "nodeSelector": fields(
            {
                "cloud.google.com/gke-tpu-accelerator": {"pattern": "^tpu-"},
                "cloud.google.com/gke-tpu-topology": {"pattern": r"^\d+(x\d+)+$"},
            }
        )
        | {"additionalProperties": {"type": "string"}},  # a bare true is no string, and is refused by the cluster
        "containers": items(CONTAINER),
        "volumes": items(fields({"name": TEXT, "csi": fields({"driver": TEXT, "volumeAttributes": {}})})),
    }
)
JOB = fields({"parallelism": COUNT, "completions": COUNT, "backoffLimit": {"enum": [0]}, "template": {}})
JOB["properties"]["template"] = fields({"spec": POD})
JOBSET = fields(
    {
        "apiVersion": {"enum": ["jobset.x-k8s.io/v1alpha2"]},
        "kind": {"enum": ["JobSet"]},
        "metadata": fields({"name": {"pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}}),
        "spec": fields(
            {
                "failurePolicy": fields({"maxRestarts": COUNT}),
                "replicatedJobs": items(fields({"name": TEXT, "replicas": COUNT, "template": fields({"spec": JOB})})),
            }
        ),
    }
)


def run(*command, **environ):
    return subprocess.run(list(map(str, command)), env=os.environ | environ, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_has_nothing_to_say(script):
    done = run(Path(sys.executable).with_name("shellcheck"), script)
    assert done.returncode == 0, done.stdout


def test_the_manifest_has_the_form_of_a_jobset():
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    jsonschema.validate(manifest, JOBSET)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    limits = [container["resources"]["limits"]["google.com/tpu"] for container in pod["containers"]]
    assert job["parallelism"] == job["completions"] == chips // sum(limits)  # a pod on every host of the slice
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["backoffLimit"] = 6
    with pytest.raises(jsonschema.ValidationError, match="6 is not one of"):
        jsonschema.validate(manifest, JOBSET)


def test_the_line_in_the_pod_fails_until_there_is_a_model(tmp_path):
    """What the pod runs, with a stand-in for v2t that stops with 0 on SIGTERM, as v2t does."""
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    line = container["args"][0].replace("runs/NAME", str(tmp_path))
    stand_in = tmp_path / "v2t"
    # It waits before it says so: the shell that started it must know its number by then, on a busy machine too.
    stand_in.write_text("#!/bin/bash\ntrap 'exit 0' TERM\nsleep 0.5\necho up\nsleep ${SECONDS_TO_RUN} & wait\n")
    stand_in.chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SECONDS_TO_RUN": "20"}
    with subprocess.Popen([*container["command"], line], env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.terminate()
        assert process.wait(10) == 75
    (tmp_path / "evaluation.json").write_text("{}")
    done = subprocess.run([*container["command"], line], env=environ | {"SECONDS_TO_RUN": "0"}, timeout=10)
    assert done.returncode == 0


def test_slurm_runs_one_process_a_node():
    done = run("bash", LAUNCH / "slurm.sbatch", "configs/tiny.py", "/shared/run", "--seed", "1", DRY_RUN="1")
    assert done.stdout == "srun --kill-on-bad-exit=1 v2t train configs/tiny.py --workdir /shared/run --seed 1\n"
    done = run("bash", LAUNCH / "slurm.sbatch", "configs/tiny.py")
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch")
    assert "#SBATCH --ntasks-per-node=1\n" in (LAUNCH / "slurm.sbatch").read_text()


def dry(*arguments, **environ):
    """The commands that a dry run prints, as words."""
    done = run(LAUNCH / "tpu_vm.sh", "--dry-run", *arguments, **environ)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def actions(commands):
    return [command[4] for command in commands]


def test_a_tpu_slice_is_created_used_recreated_and_deleted():
    settings = {"BUCKET": "mine", "SOURCE": "git+https://x/v2t_jax"}
    recipe = str(ROOT / "configs" / "tiny.py")
    assert actions(dry("create", **settings)) == ["create", "ssh"]
    commands = dry("run", recipe, "--name", "two words", **settings)
    assert actions(commands) == ["ssh", "scp", "ssh"] and all("--worker=all" in command for command in commands)
    assert commands[-1][-1].endswith(
        "cd ~/bucket && ~/venv/bin/v2t train ~/recipes/configs/tiny.py --workdir runs/tiny --name two\\ words"
    )
    assert actions(dry("resume", recipe, **settings)) == ["delete", "create", "ssh", "ssh", "scp", "ssh"]
    assert actions(dry("delete")) == ["delete"]
    assert run(LAUNCH / "tpu_vm.sh").returncode == 2
    missing = run(LAUNCH / "tpu_vm.sh", "run", recipe)
    assert missing.returncode != 0 and "is the bucket that holds the work directory" in missing.stderr


def test_the_dry_run_of_the_documents_works_as_printed():
    environ = {name: value for name, value in os.environ.items() if name not in ("BUCKET", "SOURCE")}
    lines = [line.split("#")[0].strip() for file in ROOT.glob("docs/*.md") for line in file.read_text().splitlines()]
    lines = [line for line in lines if line.startswith("launch/tpu_vm.sh --dry-run")]
    assert lines
    for line in lines:
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=environ, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("gcloud compute tpus tpu-vm"), done.stderr


def test_a_slice_gets_the_whole_folder_of_recipes_and_a_new_python(tmp_path):
    """Five of the recipes import a sibling: each must load from the copy, as the printed command names it."""
    (*_, copy, train) = dry("run", str(ROOT / "configs" / "gtr_nq32_corrector.py"), BUCKET="mine")
    assert "--recurse" in copy and f"{ROOT}/configs" in copy and "v2t:recipes" in copy
    shutil.copytree(f"{ROOT}/configs", tmp_path / "recipes" / "configs")
    words = train[-1].split()
    recipe = words[words.index("train") + 1].replace("~", str(tmp_path))
    assert load_recipe(recipe).initial_inverter == "runs/gtr_nq32_inverter/model"  # beside --workdir runs/...
    install = dry("create", SOURCE="x")[-1][-1]
    assert "uv venv -q --python 3.11 ~/venv" in install and "--python ~/venv/bin/python 'v2t_jax[tpu] @ x'" in install


def test_the_image_holds_what_the_pod_runs():
    image = (LAUNCH / "Dockerfile").read_text()
    container = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"][
        "spec"
    ]["template"]["spec"]["containers"][0]
    python = re.search(r"^FROM python:3\.(\d+)", image, re.M)
    assert python is not None and int(python[1]) >= 11
    assert "COPY configs /configs\n" in image and "v2t train /configs/NAME.py" in container["args"][0]
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == [container["workingDir"]]
    assert "--workdir runs/NAME" in container["args"][0]  # in the bucket, as are data/ and runs/ of the recipes


def test_each_says_what_it_costs_and_how_long_it_takes():
    for file in LAUNCH.iterdir():
        text = file.read_text()
        assert "Cost" in text and "Time:" in text, file.name
