# Two commands do everything, set-up included, on a fresh clone:
#   make demo   builds the world, pre-trains MAMO on it, evaluates, learns to answer questions    (about 10 minutes on
#               two cores)
#   make test   runs the tests
# On Windows run the lines below by hand with .venv\Scripts\python in place of $(PYTHON).

PYTHON := .venv/bin/python

.PHONY: demo test lint clean

demo: .venv/ready
	$(PYTHON) scenes.py --out data/scenes
	$(PYTHON) train.py --data data/scenes/pairs_train.jsonl --out runs/demo --resume
	$(PYTHON) eval.py world --checkpoint runs/demo/checkpoint.pt --data data/scenes
	$(PYTHON) finetune.py vqa --init runs/demo/checkpoint.pt --data data/scenes/vqa --steps 2000 --out runs/demo-vqa --resume
	$(PYTHON) eval.py vqa --checkpoint runs/demo-vqa/best.pt --data data/scenes/vqa_test.jsonl --figure runs/demo-vqa/answers.png

test: .venv/ready
	$(PYTHON) -m pytest -q

lint: .venv/ready
	$(PYTHON) -m pip install -q -c constraints.txt ruff
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

.venv/ready: requirements.txt constraints.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install -q -r requirements.txt -c constraints.txt
	touch .venv/ready

clean:
	rm -rf .venv data runs
