"""Opens the built site in Chromium and does what a reader does: searches, clicks, turns the light off, reads on a phone

python docs/build.py && python docs/check_site.py --screenshots /tmp/screenshots
"""
import argparse, base64, contextlib, functools, http.server, shutil, sys, tempfile, threading, time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

site = Path(__file__).resolve().parent/'_build'/'html'
flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--hide-scrollbars']
kinds = dict(first='index.html', lessons='learn/index.html', tour='tour.html', lesson='learn/own_pieces.html', reading='learn/reading.html',
             method='method/train.html', files='reference/files.html', reference='reference/index.html',
             wing='pieces/index.html', module='training/callback.html', formulas='pieces/relations.html', pictures='runs/plots.html',
             names='reference/names.html', commands='reference/commands.html', pieces='reference/pieces.html', results='results.html',
             questions='questions.html', contribute='contribute.html', search='search.html?q=TRAINCallback',
             source='_modules/fastrain/training/callback.html', index='genindex.html')


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@contextlib.contextmanager
def served(folder):
    "The address of the site, on this machine only"
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}/'
    finally: server.shutdown()

@contextlib.contextmanager
def browser():
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    driver = shutil.which('chromedriver')
    if not (chromium and driver):
        sys.exit('There is no Chromium to look at the site with: apt-get update && apt-get install -y chromium chromium-driver')
    with tempfile.TemporaryDirectory() as folder:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in [*flags, f'--user-data-dir={folder}']: options.add_argument(flag)
        options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
        options.set_capability('webSocketUrl', False)
        b = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
        b.set_page_load_timeout(120)
        try: yield b
        finally: b.quit()


class Reader:
    "A browser with what readers do, and a list of what went wrong"
    def __init__(self, b, address): self.b,self.address,self.wrong = b,address,[]

    def open(self, page):
        self.b.get(self.address + page)
        self.wait(lambda b: b.execute_script('return document.readyState === "complete"'), f'{page} to load')

    def wait(self, condition, what, seconds=60):
        try: return WebDriverWait(self.b, seconds, .1).until(condition)
        except Exception: self.wrong.append(f'{self.here()}: waited in vain for {what}')

    def here(self): return self.b.current_url.removeprefix(self.address)
    def expect(self, right, what):
        if not right: self.wrong.append(f'{self.here()}: {what}')
    def width(self, w):
        self.b.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=w, height=900, deviceScaleFactor=1, mobile=w < 600))

    def look(self):
        "Is the page whole? Pictures loaded, formulas set, nothing wider than the window, nothing on the console"
        self.formulas()
        self.b.execute_script('document.querySelectorAll("img[loading=lazy]").forEach(i => i.loading = "eager")')
        self.wait(lambda b: not b.execute_script(broken_pictures), 'pictures')
        self.expect(not (broken := self.b.execute_script(broken_pictures)), f'pictures that do not load: {broken}')
        wide,window = self.b.execute_script('return [document.documentElement.scrollWidth, window.innerWidth]')
        self.expect(wide <= window, f'{wide} pixels wide in a window of {window}: {self.b.execute_script(too_wide)}')
        self.console()

    def formulas(self):
        if not self.b.execute_script('return document.querySelectorAll(".math").length'): return
        self.wait(lambda b: b.execute_script('return !!(window.MathJax && MathJax.startup && MathJax.startup.promise)'), 'MathJax')
        self.b.execute_async_script('MathJax.startup.promise.then(arguments[arguments.length - 1])')
        left = self.b.execute_script(unset_formulas)
        self.expect(not left, f'formulas that are not set: {left}')

    def console(self):
        for entry in self.b.get_log('browser'):
            if entry['level'] == 'SEVERE': self.wrong.append(f'{self.here()}: on the console: {entry["message"]}')

    def click(self, selector):
        found = self.wait(lambda b: [e for e in b.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()], f'a link {selector}')
        if found:
            before = self.b.current_url
            self.b.execute_script('arguments[0].scrollIntoView({block: "center"})', found[0])
            found[0].click()
            self.wait(lambda b: b.current_url != before, f'what is behind {selector}')
            self.wait(lambda b: b.execute_script('return document.readyState === "complete"'), f'what is behind {selector} to load')

    def picture(self, file):
        "The whole page, as far as it is not endless"
        height = min(self.b.execute_script('return document.documentElement.scrollHeight'), 6000)
        clip = dict(x=0, y=0, width=self.b.execute_script('return window.innerWidth'), height=height, scale=1)
        shot = self.b.execute_cdp_cmd('Page.captureScreenshot', dict(captureBeyondViewport=True, clip=clip))
        file.write_bytes(base64.b64decode(shot['data']))

broken_pictures = '''return [...document.images].filter(i => i.getClientRects().length && !(i.complete && i.naturalWidth))
    .map(i => i.src)'''
unset_formulas = '''return [...document.querySelectorAll(".math")]
    .filter(m => !m.querySelector("mjx-container") || m.querySelector("mjx-merror")).map(m => m.textContent.slice(0, 80))'''
too_wide = '''return [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1).slice(0, 3)
    .map(e => e.tagName + "." + e.className)'''


def find_by_search(reader, name, page):
    "Type a name into the search as a reader does, and follow the first result"
    reader.open('index.html')
    reader.b.find_element(By.TAG_NAME, 'body').send_keys(Keys.CONTROL, 'k')
    fields = 'input[type=search]'
    field = reader.wait(lambda b: [e for e in b.find_elements(By.CSS_SELECTOR, fields) if e.is_displayed()], 'the field to search in')
    if not field: return
    field[0].send_keys(name, Keys.ENTER)
    reader.wait(lambda b: b.find_elements(By.CSS_SELECTOR, '#search-results li a'), f'results of a search for {name}')
    found = [a.get_attribute('href') for a in reader.b.find_elements(By.CSS_SELECTOR, '#search-results li a')]
    reader.expect(any(page in h for h in found[:3]), f'a search for {name} does not lead to {page} but to {found[:3]}')
    reader.console()

def click_through(reader):
    "From the first page to a lesson, to the reference, to a module, and back"
    reader.open('index.html')
    reader.click('.bd-header a[href*="learn/index.html"]')
    reader.look()
    reader.click('.bd-article a[href*="own_pieces.html"]')
    reader.look()
    reader.click('.bd-header a[href*="reference/index.html"]')
    reader.look()
    reader.click('.bd-sidebar a[href*="training/index.html"]')
    reader.look()
    reader.click('.bd-article a[href*="callback.html"]')
    reader.expect('training/callback.html' in reader.here(), 'the page of TRAINCallback was expected')
    reader.look()
    reader.click('.bd-header a.navbar-brand')
    reader.expect(reader.here() in ('', 'index.html', '#', 'index.html#'), 'the first page was expected')

def sort_a_table(reader):
    "By a click on a column, and the other way round by another one"
    reader.open('results.html')
    for order in ('ascending', 'descending'):
        values = reader.b.execute_script(sorted_column)
        reader.expect(values == sorted(values, reverse=order == 'descending'), f'a click on a column does not sort it {order}: {values}')
    reader.console()

sorted_column = '''const table = [...document.querySelectorAll("table")].find(t => t.querySelector("th.sortable"))
    if (!table) return ["no table that sorts"]
    table.tHead.rows[0].cells[1].click()
    return [...table.tBodies[0].rows].map(row => parseFloat(row.cells[1].textContent))'''

def turn_dark(reader):
    "By the button in the header, in the theme's versions with a menu and without"
    reader.open('training/schedules.html')
    ground = 'return getComputedStyle(document.body).backgroundColor'
    light = reader.b.execute_script(ground)
    for _ in range(3): # without a menu, a click goes on from the system's mode to light, and to dark
        shown(reader, 'button.theme-switch-button')[0].click()
        time.sleep(.5)
        for entry in shown(reader, 'button.theme-change-button[data-mode=dark]'): entry.click()
        if reader.b.execute_script('return document.documentElement.dataset.mode') == 'dark': break
    time.sleep(.5)
    theme = reader.b.execute_script('return document.documentElement.dataset.theme')
    reader.expect(theme == 'dark', f'the button turns the page {theme}, not dark')
    reader.expect(reader.b.execute_script(ground) != light, 'dark mode has the background of light mode')
    reader.look()
    reader.b.execute_script('localStorage.clear()')

def menu_on_a_phone(reader):
    "What stands above and beside a page on a screen is behind a button there"
    reader.width(400)
    reader.open('training/callback.html')
    shown(reader, '.primary-toggle')[0].click()
    for target in ('learn/index.html', 'attacks/index.html'):
        reader.wait(lambda b: shown(reader, f'a[href*="{target}"]'), f'{target} in the menu')
    reader.console()

def shown(reader, selector): return [e for e in reader.b.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()]

def every_page(reader, width):
    reader.width(width)
    for f in sorted(site.rglob('*.html')):
        name = f.relative_to(site).as_posix()
        if name.startswith('_static') or name.startswith('_modules') and width > 600: continue
        reader.open(name)
        reader.look()

def screenshots(reader, folder):
    "Each kind of page, wide and narrow, light and dark"
    folder.mkdir(parents=True, exist_ok=True)
    for width in (1300, 400):
        reader.width(width)
        for kind,page in kinds.items():
            reader.open(page)
            reader.formulas()
            if kind == 'search': time.sleep(2)
            for mode in ('light', 'dark'):
                reader.b.execute_script(f'document.documentElement.dataset.mode = document.documentElement.dataset.theme = "{mode}"')
                reader.picture(folder/f'{kind}-{width}-{mode}.png')


def look_at_report(file):
    "Folded and unfolded, on a screen and on a phone"
    with browser() as b:
        reader = Reader(b, file.resolve().parent.as_uri() + '/')
        for width in (1300, 400):
            reader.width(width)
            reader.open(file.name)
            reader.look()
            b.execute_script('document.querySelectorAll("details").forEach(d => d.open = true)')
            reader.look()
    if reader.wrong: sys.exit('\n'.join(reader.wrong))
    print(f'{file} is as it should be at 400 and 1300 pixels')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--screenshots', type=Path, help='Only keep pictures of each kind of page in this folder, 1300 and 400 pixels wide')
    parser.add_argument('--report', type=Path, help="Only look at this file, the report of a run")
    args = parser.parse_args()
    if args.report: return look_at_report(args.report)
    if not (site/'index.html').is_file(): sys.exit('There is no site yet: python docs/build.py')
    with served(site) as address, browser() as b:
        reader = Reader(b, address)
        if args.screenshots: return screenshots(reader, args.screenshots)
        began = time.time()
        reader.width(1300)
        find_by_search(reader, 'TRAINCallback', 'training/callback.html')
        find_by_search(reader, 'topology_loss', 'pieces/relations.html')
        click_through(reader)
        sort_a_table(reader)
        turn_dark(reader)
        menu_on_a_phone(reader)
        every_page(reader, 400)
        every_page(reader, 1300)
    if reader.wrong: sys.exit('\n'.join(reader.wrong))
    print(f'The site is as it should be: search, links, sorted tables, dark mode, the menu of a phone, all pages at 400 and 1300 pixels ({time.time() - began:.0f} s)')

if __name__ == '__main__': main()
