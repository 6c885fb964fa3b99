"""Frontend Design, the other half of ColBench.

An agent shows web pages, a simulated human says how they differ from the one it wants.

    browser, worker, layout, resources    pages to pictures in a real Chromium, offline and watched
    protocol, pages                       what counts as a page in a message; the bundled tasks and their page language
    human, reviewer                       who looks at the pages: a vision model, or a scripted comparison
    score                                 CLIP similarity, or a measure of pixels that needs no weights
    tasks                                 the published format, and WebSight by one command
    environment                           all of it as the contract of colbench.env.base wants it
"""
