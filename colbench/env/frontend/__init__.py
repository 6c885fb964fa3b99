"""Frontend Design, the second half of ColBench.

The agent shows web pages. A simulated human says how they differ from the page it wants.

    browser, worker, layout     pages to pictures in a real Chromium: offline, sandboxed
    resources, configuration    which requests of a page are answered, which of its scripts run
    protocol                    which part of a message is the page
    pages, tasks                the bundled tasks and their page language; WebSight's tasks
    human, reviewer             a vision model or a scripted comparison looks at the pages
    score                       CLIP similarity, or pixel similarity, which needs no model
    environment                 the subclass of colbench.env.base.Environment
"""
