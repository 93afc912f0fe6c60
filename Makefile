# Two commands do everything, set-up included, on a fresh clone:
#   make demo        builds the world, pre-trains MAMO on it, evaluates, learns to answer questions, writes a page to look at
#                    (11 to 14 minutes on two cores)
#   make test        runs the tests
# and three more for who changes something here:
#   make lint        checks the form of the code, and that the pages say what is
#   make notebooks   executes the notebooks from clean, solutions too
#   make page-test   uses the pages of tools/ in a headless browser (needs Chromium, npm and curl)
# On Windows run the lines below by hand with .venv\Scripts\python in place of $(PYTHON).

PYTHON := .venv/bin/python

.PHONY: demo test lint notebooks page-test clean

demo: .venv/ready
	$(PYTHON) -m world.scenes --out data/scenes
	$(PYTHON) train.py --data data/scenes/pairs_train.jsonl --out runs/demo --resume
	$(PYTHON) eval.py world --checkpoint runs/demo/checkpoint.pt --data data/scenes
	$(PYTHON) finetune.py vqa --init runs/demo/checkpoint.pt --data data/scenes/vqa --lr 1e-3 --lr-head 4e-3 --steps 1500 --out runs/demo-vqa --resume
	$(PYTHON) eval.py vqa --checkpoint runs/demo-vqa/best.pt --data data/scenes/vqa_test.jsonl --figure runs/demo-vqa/answers.png
	$(PYTHON) -m tools.report --checkpoint runs/demo/checkpoint.pt --data data/scenes/pairs_test.jsonl

test: .venv/ready
	HALF=1 $(PYTHON) -m pytest -q & other=$$!; HALF=0 $(PYTHON) -m pytest -q; status=$$?; wait $$other && exit $$status

lint: .venv/ready
	$(PYTHON) -m pip install -q -c constraints.txt ruff
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pytest -q docs

notebooks: .venv/notebooks
	$(PYTHON) -m pytest -q notebooks
	$(PYTHON) notebooks/execute.py

page-test: .venv/ready
	rm -rf runs/page
	npm ci --prefix tests/page --no-audit --no-fund --loglevel error
	$(PYTHON) -m world.scenes --out data/page --train 400 --val 60 --test 60
	$(PYTHON) train.py --data data/page/pairs_train.jsonl --out runs/page --steps 60 --log-every 10
	$(PYTHON) eval.py world --checkpoint runs/page/checkpoint.pt --data data/page
	$(PYTHON) -m tools.report --checkpoint runs/page/checkpoint.pt --data data/page/pairs_test.jsonl
	$(PYTHON) -m tools.trace --steps 0 20 --variants "as it is" "MRM alone" --data data/page/pairs_train.jsonl --out runs/page/trace.html
	$(PYTHON) -m tools.serve --checkpoint runs/page/checkpoint.pt --data data/page/pairs_test.jsonl --port 8765 & server=$$!; \
	until curl -so /dev/null http://127.0.0.1:8765/ || ! kill -0 $$server; do sleep 1; done; \
	node tests/page/check.mjs runs/page/report.html runs/page/trace.html http://127.0.0.1:8765/ runs/page; status=$$?; kill $$server; exit $$status

.venv/ready: requirements.txt constraints.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install -q -r requirements.txt -c constraints.txt
	# Every command works from any folder, and threads that wait sleep: they leave their core to a browser.
	$(PYTHON) -c "import pathlib, site; pathlib.Path(site.getsitepackages()[-1], 'here.pth').write_text('$(CURDIR)\nimport os; os.environ.setdefault(\'OMP_WAIT_POLICY\', \'passive\')\n')"
	touch .venv/ready

.venv/notebooks: .venv/ready notebooks/requirements.txt
	$(PYTHON) -m pip install -q -r notebooks/requirements.txt -c constraints.txt
	touch .venv/notebooks

clean:
	rm -rf .venv data runs
